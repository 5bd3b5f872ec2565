"""Language: the decoder and what a text model is made of."""
