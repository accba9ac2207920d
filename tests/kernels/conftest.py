import pytest

from pallas_kernels.device import hopper_device


@pytest.fixture(params=["xla", pytest.param("mosaic", marks=pytest.mark.gpu)])
def implementation(request):
    """The name of every implementation that this machine can run."""
    if request.param == "mosaic" and hopper_device() is None:
        pytest.skip("needs an NVIDIA GPU of compute capability 9.0")
    return request.param
