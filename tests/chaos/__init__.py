"""Training that is broken on purpose, and what must hold after each break.

    python -m tests.chaos --lives=200     # the long form; a table of what was done and what was lost
    python -m tests.chaos --seed=3 --campaign=7    # one campaign again, as a failure asks for

A campaign is one training run of a very small model, lived through in many lives: each is a process (or one a rank)
that is killed, signalled, starved of disk or made to fail, and the next resumes with --resume=auto. Between lives
checkpoints are damaged, and the number of ranks may change. The run must end as one that nobody disturbed: same
weights, same optimizer state, same curve, to the bit.

    lives.py      starts lives: forks of a process that has imported everything, so that a life takes a second
    faults.py     what is done inside a life, and to the files between two
    checks.py     what must hold: read from the files and logs alone, with code of its own
    campaign.py   draws the faults and runs one campaign
    __main__.py   the command: references, campaigns side by side, the table
"""
