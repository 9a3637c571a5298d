// Every cell, once: X(name, type, number of states). The name is the one Python uses.
#pragma once

#define XLSTM_CELLS(X)         \
  X(slstm, SLSTM<false>, 4)    \
  X(slstm_exp, SLSTM<true>, 4) \
  X(lstm, LSTM, 2)
