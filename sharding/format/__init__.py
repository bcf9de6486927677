"""The on-disk format: contents and names of every published file. Pure: no file is opened."""
