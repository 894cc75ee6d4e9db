"""Formats of text: from a row of a data set to the text of a group."""
