//! The two things on the other side: the machine (launched and controlled), and the agent in it (called).
