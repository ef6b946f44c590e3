"""Pool ordinary GPUs to run and fine-tune language models none of them could hold alone."""

__version__ = "0.1.0"
