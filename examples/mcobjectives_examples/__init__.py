"""The models, data sets, training and tables of the paper, built on mcobjectives."""
