"""What picture files tell of themselves before they are decoded."""
