"""Input and output for all parts of clipfast: files, tables of text, progress bars, pages of HTML."""
