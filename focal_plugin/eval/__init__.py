"""What a model has found, held against the annotations: COCO's numbers, kinds of error, pictures and a page."""
