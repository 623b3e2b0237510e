"""Search of pictures and texts by a model's features: embedding, search, filters, duplicates, clusters, and the app.

``embeddings`` holds features with the metadata of each item, in memory or in the folder that ``layout`` describes, and
``where`` filters items by their metadata.
"""
