"""The command line ``clipfast``: a module for each command, and the arguments that they share."""
