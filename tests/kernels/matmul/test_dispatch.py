"""Which implementation is taken, seen without a GPU: the kernels are replaced by a note that they were called."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import can_use_mosaic, device, int8_matmul, weight_only_int4_matmul
from pallas_kernels.matmul.hopper import launch, tuning
from pallas_kernels.matmul.hopper.decoders import WEIGHT_ONLY_ROWS, Int8
from pallas_kernels.matmul.hopper.problem import Problem

X, W, ONE = jnp.ones((4, 256), jnp.int8), jnp.ones((64, 256), jnp.int8), jnp.float32(1)


@pytest.fixture
def hopper(monkeypatch):
    """A process that believes to have an H200, and the calls its kernels got."""
    calls = []

    def kernel(p, config, x, weight, x_scale, weight_scale, group_scale, bias):
        calls.append(config)
        return jnp.zeros((p.m, p.n), p.out_dtype)

    monkeypatch.setattr(device, "hopper_device", lambda: "NVIDIA H200")
    monkeypatch.setattr(launch, "matmul", kernel)
    device.clear_caches()
    yield calls
    device.clear_caches()


def test_the_kernels_are_taken_where_they_can_be(hopper):
    int8_matmul(X, W, ONE, ONE)
    assert hopper == [tuning.rule(Problem(m=4, n=64, k=256, decoder=Int8(), out_dtype=jnp.dtype("bfloat16")))]


def test_xla_is_taken_where_they_cannot(hopper):
    odd = jnp.ones((30, 256), jnp.int8)
    assert int8_matmul(X, odd, ONE, ONE, out_dtype=jnp.int32).tolist() == [[256] * 30] * 4 and not hopper
    with pytest.raises(NotImplementedError, match=r"mosaic.*\(4, 256\) int8: N = 30 is not a multiple of 64"):
        int8_matmul(X, odd, ONE, ONE, implementation="mosaic")


def test_xla_is_taken_where_it_is_faster(hopper, monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda p, device: None)
    int8_matmul(X, W, ONE, ONE)
    assert not hopper
    int8_matmul(X, W, ONE, ONE, implementation="mosaic")
    assert len(hopper) == 1


def test_weights_alone_are_multiplied_by_xla_where_there_are_many_rows(hopper):
    packed, scales = jnp.ones((64, 128), jnp.int8), jnp.ones((2, 64), jnp.float32)
    for rows in (4, WEIGHT_ONLY_ROWS):
        weight_only_int4_matmul(jnp.ones((rows, 256), jnp.bfloat16), packed, scales)
    assert [config for config in hopper if not isinstance(config, tuning.DecodeConfig)] == [] and len(hopper) == 1


def test_xla_is_taken_when_asked_for(hopper):
    int8_matmul(X, W, ONE, ONE, implementation="xla")
    assert not hopper


def test_another_platform_takes_xla_though_there_is_a_gpu(hopper):
    result = jax.jit(lambda x: int8_matmul(x, W, ONE, ONE, out_dtype=jnp.int32))(X)
    assert (result == 256).all()  # The noted kernel would give zeros; this ran on the CPU.


def test_the_choice_is_logged_once_a_shape(hopper, caplog):
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(3):
            int8_matmul(X, W, ONE, ONE)
    assert [record.message.split(":")[0] for record in caplog.records] == ["int8_matmul 4 x 64 x 256"]
    assert "mosaic, DecodeConfig" in caplog.records[0].message


def test_without_a_gpu_mosaic_is_refused(monkeypatch):
    monkeypatch.setattr(device, "hopper_device", lambda: None)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        int8_matmul(X, W, ONE, ONE, implementation="mosaic")


def test_the_predicate_says_what_can_be_used():
    assert can_use_mosaic(4, 16, 4096, 4096, device="NVIDIA H200")
    assert not can_use_mosaic(4, 16, 4096, 4000, device="NVIDIA H200")
    assert can_use_mosaic(8, 1, 64, 128) == (device.hopper_device() is not None)
