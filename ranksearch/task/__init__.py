"""What is compressed and how it is judged: the model with its data, its training, and the evaluation of one plan."""
