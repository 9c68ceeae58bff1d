"""The intermediate representation: program, weights, nodes, operators, and their verification."""
