"""What makes the book of its notebooks: run them, stamp them, check them, copy them for students.

The command is ``python -m minicpm_lite.lab.press``. A notebook goes through these modules in this order:
`notebook` reads and writes it, `stamps` says whether its outputs are stale, `execute` runs it, `gates` holds
it to what the book promises, and `student` takes the solutions out.
"""
