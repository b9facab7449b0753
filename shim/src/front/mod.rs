//! What engines say, turned into calls of the engine.
