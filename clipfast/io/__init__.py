"""What every room needs to read and write: files, locks of folders, tables of text, progress bars, pages of HTML."""
