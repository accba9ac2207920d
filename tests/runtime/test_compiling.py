"""Where compiled programs are kept."""

import jax
import pytest

from fqjax.runtime.compiling import use_compilation_cache
from fqjax.runtime.errors import InputError


@pytest.fixture
def unset():
    """JAX's setting as it was before."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_directory_is_made_and_used(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = use_compilation_cache()
    assert path.parent == tmp_path / "fqjax" / "compiled" and path.is_dir()
    assert use_compilation_cache(tmp_path / "other") == tmp_path / "other"
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "other")
    assert use_compilation_cache() == tmp_path / "other"  # One that was named before is left as it is.


def test_a_directory_that_cannot_be_made_is_named(unset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/cache: cannot keep compiled programs there"):
        use_compilation_cache(tmp_path / "file" / "cache")
