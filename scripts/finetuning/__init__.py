"""Parts of `train_sft.py`."""
