"""What can be wrong with a run, found before anything is allocated and without a GPU.

checklist.py goes through checks: a start ends at the first that fails, `plan.py check` and a dry run find all. run.py
is the list for a run, whole.py begins with its configuration and folder.
"""
