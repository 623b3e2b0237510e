"""Using a model's features: pictures and texts that are embedded once are searched, filtered, sorted and looked at.

``embeddings`` holds features with what is known of each item, in memory or in the folder that ``layout`` describes, and
``where`` chooses items by that.
"""
