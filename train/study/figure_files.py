"""The names of the files between a study and its figure."""

CURVES, FIGURE = "curves.json", "curves.png"
