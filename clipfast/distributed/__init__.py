"""The processes that train together: their process groups, their communication, and DTensors."""
