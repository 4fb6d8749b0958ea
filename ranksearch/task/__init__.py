"""The task of a study (model, data, loss, score), training, and the evaluation of one plan."""
