"""The tasks of ``clipfast eval``: each module adds the parser of one task, and runs the task."""
