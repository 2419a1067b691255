"""`--engine beam`: the data commands as pipelines of Apache Beam, with the same code for each row as on one machine."""
