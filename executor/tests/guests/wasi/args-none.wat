;; No arguments were given: none are counted.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (call $must (i32.eqz (call $args_sizes_get (i32.const 0) (i32.const 4))) (i32.const 1))
    (call $must (i32.eqz (i32.load (i32.const 0))) (i32.const 2))
    (call $must (i32.eqz (i32.load (i32.const 4))) (i32.const 3))))
