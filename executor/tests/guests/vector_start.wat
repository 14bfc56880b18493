;; Is no command: its start function takes a vector.
(module (func (export "_start") (param v128)))
