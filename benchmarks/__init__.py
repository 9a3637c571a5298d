"""Speed of the operations against plain torch, on this machine, correct results only.

    python -m benchmarks run [--op slstm] [--case B8-T512] [--quick] [--no-save]
    python -m benchmarks report
    pytest benchmarks --benchmark-only [--quick]

cases.py lists every case once; the command line, pytest and the report iterate that list. A case
is first compared with the float64 reference (gate.py) and is not timed when it is off. Its variants
are then timed call by call in turn (timing.py), so that whatever else the machine does falls on all
of them alike. Ratios are only ever taken within one run.
"""
