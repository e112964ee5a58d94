"""Break a small pipeline in every way we know, while it runs, and compare what it leaves with a calm run.

    python -m chaos --seed 7                       one run with faults drawn by the seed
    python -m chaos --minutes 60                   as many seeds as fit, from --seed on
    python -m chaos --seed 7 --faults 3,5          only these faults of the seed's schedule
    python -m chaos --seed 7 --shrink              the fewest faults of the seed that still fail

    schedule    which faults, when, to whom: a function of the seed
    catalogue   what each kind of fault does, and how it is undone
    world       the nodes, store, proxies and tracking server that a run needs, and the person who starts it
    check       what must be the same as after a calm run

Needs Linux, root, iproute2 and nftables (network namespaces), and the test extra (SeaweedFS).
"""
