"""Models carried to other programs' folders and back."""
