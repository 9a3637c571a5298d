"""The mixer of mLSTM and window, in the place of attention: arXiv 2603.15590."""
