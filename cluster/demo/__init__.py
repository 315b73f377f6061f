"""`gptmoe demo`: a corpus becomes a poem that came over gRPC, by the commands anyone can type."""
