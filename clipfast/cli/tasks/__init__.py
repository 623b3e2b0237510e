"""The tasks of ``clipfast eval``: each module adds the parser of one, and runs it."""
