"""The command line: a module for each command, and what their arguments share."""
