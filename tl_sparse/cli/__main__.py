"""``python -m tl_sparse.cli``, which launchers of several processes start."""

from tl_sparse.cli import main

main()
