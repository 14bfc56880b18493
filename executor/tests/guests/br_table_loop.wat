;; Never ends, by way of a jump table.
(module
  (memory (export "memory") 1)
  (func (export "_start") (local $n i32)
    (loop $again
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br_table $again $again $again (i32.and (local.get $n) (i32.const 3))))))
