"""The engine: many requests share one model. request.py is what comes in and goes out, engine.py the way in.

Knows ids and logits; text only at its edge (text.py, grammar.py); tensors only behind the `Runner`.
"""
