"""The command line: a module for each command, and the arguments that they share."""
