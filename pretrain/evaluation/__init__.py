"""What a trained model knows: LAMBADA, BLiMP and the Children's Book Test by the paper's zero-shot protocols, and any
task of EleutherAI's lm-evaluation-harness.

    lambada.py, blimp.py, cbt.py   a published file format -> examples
    examples.py                    what an example is, what it asks of a model, and when the model is right
    likelihood.py                  what a model in any layout answers, in batches
    tasks.py                       the list of tasks, and where their files are
    results.py                     what a task gives: numbers, a table, a file
    models.py                      a checkpoint as a model of this rank, in any layout
    training.py                    the tasks of a run, every evaluate.tasks_every_steps
    harness.py                     the adapter to lm-evaluation-harness, with the tasks in harness_tasks/

launch/evaluate.py is pretrain/cli/evaluate.py. The validation loss on a held-out split is pretrain/evaluate.py.
"""
