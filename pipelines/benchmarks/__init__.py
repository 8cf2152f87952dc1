"""What `published` and `reproduce` are made of: the rows, the files they were measured on, the tasks, the measures."""
