;; What is written arrives, and its length is told.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 64) "one, three")
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 10))
    (call $must (i32.eqz (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 32))) (i32.const 1))
    (call $must (i32.eq (i32.load (i32.const 32)) (i32.const 10)) (i32.const 2))))
