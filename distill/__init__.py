"""Distil a larger language model into a smaller recurrent one on the kernels of xlstm_kernels."""
