"""Facts that picture files tell of themselves before they are decoded."""
