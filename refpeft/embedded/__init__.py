"""The model and the data set that `refpeft train` takes when it is given none; README.md describes both."""
