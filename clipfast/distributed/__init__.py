"""The processes that work together: their group, their messages, and tensors that are cut between them."""
