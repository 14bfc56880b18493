;; Tries every small descriptor as a directory for ../../etc/passwd and an absolute path; traps if one opens.
(module
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "{}")
  (data (i32.const 128) "../../../../etc/passwd")
  (func $try (param $fd i32) (param $at i32) (param $length i32)
    (if (i32.eqz (call $open (local.get $fd) (i32.const 1) (local.get $at) (local.get $length) (i32.const 0)
                             (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 32)))
      (then unreachable))
    (if (i32.eqz (call $symlink (local.get $at) (local.get $length) (local.get $fd) (i32.const 64) (i32.const 1)))
      (then unreachable)))
  (func (export "_start") (local $fd i32)
    (loop $again
      (call $try (local.get $fd) (i32.const 128) (i32.const 22))
      (call $try (local.get $fd) (i32.const 139) (i32.const 11))
      (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $fd) (i32.const 64))))
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 2))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
