"""Saving and loading: an Orbax directory with a manifest and a tokenizer beside the arrays.

    out/                 an Orbax checkpoint, readable with ``orbax.checkpoint.v1.load``
      state/ ...         the arrays, a nested dictionary (fqjax/checkpoint/tree.py)
      fqjax.json         what they are (fqjax/checkpoint/manifest.py)
      tokenizer/         as transformers saves it, if there is one
      calibration.safetensors   what calibration found out, if it is known (fqjax/checkpoint/calibration_record.py)

:mod:`fqjax.checkpoint.orbax.write` saves models, :mod:`fqjax.checkpoint.orbax.read` loads them.
"""
