"""What a trained model does with a text: attention maps, and which experts its routers choose for each token.

routers.py and attention.py compute both from the input of a layer, by the formulas of model/attention, because the
layers themselves keep neither; trace.py runs a model over a text and looks at those inputs; counting.py counts choices;
pictures.py, page.py and numbers.py write what was found.
"""
