"""LongAlign: long captions read sentence by sentence, and preference that is decomposed."""
