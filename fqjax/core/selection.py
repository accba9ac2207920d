"""Which layers get 4 bits: turn the least sensitive ones, until they hold a given share of the arithmetic.

FlattenQuant computes 48.29 % of the linear layers' multiply-accumulates in INT4 and the rest in INT8.  Which layers those
are is decided here by sensitivity, measured on calibration data (:mod:`fqjax.sensitivity`).
"""

from collections.abc import Sequence


def select_low_bits(errors: Sequence[float], macs: Sequence[int], share: float) -> list[bool]:
    """Chooses the layers that are computed in the lower precision.

    Layers are taken in the order of rising error per multiply-accumulate until they hold ``share`` of all
    multiply-accumulates; then those that turn out not to be needed for it are given back, the costliest first.

    Args:
      errors: what each layer costs in the lower precision, in any additive measure.
      macs: multiply-accumulates of each layer.
      share: least share of the sum of ``macs``, in [0, 1].

    Returns:
      For each layer, whether it was chosen.  No layer if ``share`` is 0, every layer if it is 1.
    """
    needed = share * sum(macs)
    order = sorted(range(len(errors)), key=lambda i: errors[i] / macs[i])
    chosen: list[int] = []
    total = 0
    for i in order:
        if total >= needed:
            break
        chosen.append(i)
        total += macs[i]
    for i in sorted(chosen, key=lambda i: -errors[i]):
        if total - macs[i] >= needed:
            chosen.remove(i)
            total -= macs[i]
    return [i in chosen for i in range(len(errors))]
