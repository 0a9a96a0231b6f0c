"""`python -m align_cli`: the same as `t2ialign`."""

from align_cli.cli.main import main

main()
